"""Hardware, processes and signals of the machine that runs this."""
