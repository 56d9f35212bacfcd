"""Everything on one machine with nothing preinstalled: a launcher, not another code path.

`stack.py` starts a Valkey server from a wheel, the API and one CPU worker as processes of their
own, and passes them their settings by environment.
"""
