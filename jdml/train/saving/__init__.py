"""What a checkpoint is made of: its folder, its record, its arrays and their digests."""
