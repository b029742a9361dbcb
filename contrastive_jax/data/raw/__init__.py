"""Raw documents: files and datasets of others, read a part at a time."""
