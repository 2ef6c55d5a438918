"""Papers reproduced from end to end, at the size of one CPU: each file is a command that writes its own JSON."""
