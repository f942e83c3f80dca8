"""The contract for a runtime in any language: what it must do, a bundle to try it on, and what that must give."""
