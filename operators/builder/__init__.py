"""From the texts of a concept to a verified operator.

``concept`` tokenises texts and ``spec`` settles what to build with them, within the memory that ``memory`` estimates.
``build`` computes the operator and ``checks`` holds it to the model; ``verify`` does so again for a stored one.
``combine`` builds a mixture of operators, and ``stored`` says whether an operator in the store needs no new build.
"""
