"""What runs left, as tables, plots and the PDF: this folder reads files and imports no other folder."""
