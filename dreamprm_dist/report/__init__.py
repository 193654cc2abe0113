"""Reports: one self-contained HTML page about training runs, or about a demo."""
