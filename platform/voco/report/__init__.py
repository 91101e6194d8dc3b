"""One HTML file from any outputs: tables, plots, answers side by side."""
