"""Methods trained and evaluated side by side, one cell at a time; finished cells are reused."""
