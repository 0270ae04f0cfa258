# Loaded by pulsar-api through RUBYOPT: Ruby holds output back when it is not a terminal,
# and whoever follows a deployment wants to see each line when it is printed.
$stdout.sync = true
$stderr.sync = true
