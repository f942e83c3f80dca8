"""What a bundle does with a text, in figures for people."""
