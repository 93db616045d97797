"""The report: one HTML file about one artifact or two, made of what the artifact's files say."""
