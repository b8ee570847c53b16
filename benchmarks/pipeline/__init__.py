"""`cast pipeline`: the other commands in order, each in a process of its own, finished ones reused."""
