"""One module for each image format that Pillow alone does not decode faithfully."""
