"""The documentation site: `python -m dev.site [FOLDER]` builds docs/ strictly into FOLDER, site/ by default.

`staging` copies the pages and follows links out of docs/, `generated` writes reference pages from the program itself,
`navigation` reads the order of pages from docs/index.md, and `finish` renders mathematics and writes llms.txt. The
generator between them is named in zensical.yml, with the reasons for it.
"""
