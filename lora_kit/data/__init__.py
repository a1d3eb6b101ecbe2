"""From data files to micro-batches: records -> examples -> tokens -> micro-batches.

sources, files      find the files of a source and open them; each record keeps its file and line
text_files, tables  read records from JSON, CSV and text, and from Parquet, Arrow and the Hub
strict_json         parse JSON exactly
formats, messages   convert a record of any format to an Example
rendering           render a conversation with the chat template
parts, layout       find every part of a conversation in the text, and refuse or note missing parts
answers             find the answers in the text
remarks             notes on differences between records and their tokens
template            tokenise the text and compute the loss mask
tokens              all examples as flat arrays, with every problem reported at once
cache               keep tokenised data between starts
vocabulary          check that tokenizer, data and base fit together
order, packing      choose the examples of a step, and pack them into micro-batches
plan                all of this for a recipe
"""
