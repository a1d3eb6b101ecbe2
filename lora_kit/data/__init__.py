"""From data files to micro-batches: records -> examples -> tokens -> micro-batches.

sources, files      read records from files, folders and the Hub; each record keeps its file and line
formats, messages   convert a record of any format to an Example
rendering           render an example with the chat template, and find the answers in the text
template            tokenise the text and compute the loss mask
tokens              all examples as flat arrays, with every problem reported at once
cache               keep tokenised data between starts
vocabulary          check that tokenizer, data and base fit together
order, packing      choose the examples of a step, and pack them into micro-batches
plan                all of this for a recipe
"""
