from .api import linear_recurrence as linear_recurrence
