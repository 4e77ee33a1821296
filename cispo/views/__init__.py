"""What a person sees of a run: console, log.txt, W&B and Ray metrics, all fed once a step by the loop."""

from cispo.views.views import View, Views, open_views

__all__ = ["View", "Views", "open_views"]
