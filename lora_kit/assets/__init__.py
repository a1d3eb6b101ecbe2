"""The embedded default: a tiny pretrained base, a small dataset, and the scripts that make both."""
