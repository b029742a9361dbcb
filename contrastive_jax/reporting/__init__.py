"""What `report` is made of: what was written, figures, the page."""
