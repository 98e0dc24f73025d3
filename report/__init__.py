"""Turns the files of finished runs into tables, plots and the PDF; reads files only and imports no other folder."""
