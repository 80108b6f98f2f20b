"""Feature datasets as Theia lays them out (Shang et al. 2024, arXiv 2407.20179): written, and taken in with checks.

Tars that its loader joins by position: one column of images, one of features for each model.
"""
