"""The PRM as a small web service with a page to try it on."""
