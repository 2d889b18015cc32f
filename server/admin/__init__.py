"""For who runs the server: what it learns, which drafters there are, and the page that shows it."""
