"""What all tests share: property tests without time limits, for machines that have other work."""
from hypothesis import settings

settings.register_profile("no limits", deadline=None)
settings.load_profile("no limits")
