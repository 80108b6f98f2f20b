"""Teachers from timm."""
