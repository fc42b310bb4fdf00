"""Use cases: one manager per resource, on the rules of core and the ports around them."""
