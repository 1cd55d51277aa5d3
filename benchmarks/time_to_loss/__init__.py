"""Time to a fixed validation loss over slow links, against PyTorch: see ``__main__``."""
