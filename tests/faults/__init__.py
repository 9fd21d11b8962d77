"""Fault injection: failing storage, random SIGKILL, damaged and tampered files."""
