"""What keeps a run whole: its files and checksums, signals, memory, and the search for what is not finite."""
