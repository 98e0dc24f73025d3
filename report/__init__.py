"""What runs left, as tables, plots and the PDF: it reads files and imports no other folder."""
