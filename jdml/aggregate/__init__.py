"""Module 4: what becomes of the workers' answers."""
