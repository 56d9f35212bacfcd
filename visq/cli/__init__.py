"""The command ``visq``. Its files import what a command needs when that command runs."""
