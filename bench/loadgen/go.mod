module shadowsvc/bench/loadgen

go 1.25
