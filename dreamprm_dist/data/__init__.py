"""Records, shard folders, sampling and collation: from files on disk to batches."""
