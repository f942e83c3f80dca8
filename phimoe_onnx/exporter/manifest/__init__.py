"""One file for each part of what a bundle says about itself."""
