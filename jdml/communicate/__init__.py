"""Module 3: what the workers say to each other: codecs, collectives, topology, frequency, pace."""
