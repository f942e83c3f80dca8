"""How fast a bundle runs, how much memory it takes, and how its peers do on the same work; nothing of it runs by
import.
"""
