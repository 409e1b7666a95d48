"""Shows plain decoding and SpecExtend side by side, in a local page."""
