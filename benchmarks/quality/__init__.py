"""What step reuse does to frames, on small models of the real classes that have learned something."""
