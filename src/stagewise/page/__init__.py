"""One page, a single HTML file: where the time and the memory of a step go. Without torch.

1. `page_contents` is what a page holds: steps (a Timeline each), tables, losses.
2. `plan_page` fills it from a plan and its rivals, `run_page` from what runs have recorded.
3. `waiting` finds who waited for whom; `figures` describes the pictures to plotly.
4. `fragments` writes tables as HTML; `document` puts everything, plotly included, into one file.
5. `dashboard` serves the page of a run while it trains.
"""
