"""The sockets: the few places where a recipe may take hold of training. Knows Lightning and torch; knows no paper."""
