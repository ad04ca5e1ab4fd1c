"""The models that training writes, asked in other programs: `python -m tests.clients`."""
