"""From measurements to numbers with their spread, plots, one table and one HTML page."""
