"""What was measured, put together: results and checkpoints → one document → a page, Markdown, JUnit.

document: the report as plain JSON types, of which everything else is made; schema: what those documents
are; svg, pictures, page: the page; text: Markdown and JUnit; files: all of them on disk.
"""
