"""The pages of the report as tests read them."""

import html.parser


class Elements(html.parser.HTMLParser):
  """The elements of a page with their attributes, and its tables."""

  def __init__(self, page):
    super().__init__()
    self.tags = []
    self.tables = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, sorted(name for name, _ in attrs)))
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('th', 'td'):
      self.tables[-1][-1].append('')

  def handle_data(self, data):
    if self.tags and self.tags[-1][0] in ('th', 'td'):
      self.tables[-1][-1][-1] += data

  def rows(self, number):
    """The rows of a table, each as a dict by heading."""
    headings, *rows = self.tables[number]
    return [dict(zip(headings, row, strict=True)) for row in rows]
