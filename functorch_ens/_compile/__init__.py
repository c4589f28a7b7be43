"""The fence around torch's compiler; README.md in this folder names what lies behind it."""
