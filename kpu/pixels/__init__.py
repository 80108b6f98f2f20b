"""Images as pixels: decoded as a viewer shows them, cropped per view, brought to a model's input size."""
