"""Command-line tools that turn data files into shard folders."""
