"""Networks that people really train, each led through the whole path: `python -m tests.zoo` writes how far it comes."""
