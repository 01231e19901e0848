"""report.html: one page about a run, with no scripts and no network.

report  what the run left, collected, and the page written
page    the words and tables of the page
pieces  boxes, tables and legends of it
speed   of its phases and train steps
charts  the charts, drawn with matplotlib
svg     a figure as SVG in the colours of the page
"""
