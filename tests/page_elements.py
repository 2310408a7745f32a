"""The pages of the report as tests read them."""

import html.parser


class Elements(html.parser.HTMLParser):
  """The elements of a page with their attributes, its tables and headings."""

  def __init__(self, page):
    super().__init__()
    self.tags = []
    self.tables = []
    self.headings = []
    self._open = None
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, sorted(name for name, _ in attrs)))
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('th', 'td'):
      self._open = self.tables[-1][-1]
      self._open.append('')
    elif tag in ('h1', 'h2'):
      self._open = self.headings
      self._open.append('')
    elif tag in ('p', 'br') and self._open and self._open[-1]:
      self._open[-1] += '\n'

  def handle_endtag(self, tag):
    if tag in ('th', 'td', 'h1', 'h2'):
      self._open = None

  def handle_data(self, data):
    if self._open:
      self._open[-1] += data

  def rows(self, number):
    """The rows of a table as dicts by heading, without those of one cell."""
    headings, *rows = self.tables[number]
    return [
      dict(zip(headings, row, strict=True)) for row in rows if len(row) > 1
    ]
