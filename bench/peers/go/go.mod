module shadowsvc/bench/peers/go

go 1.25

require (
	github.com/apache/cassandra-gocql-driver/v2 v2.1.2
	github.com/eclipse/paho.golang v0.23.0
	github.com/valyala/fastjson v1.6.10
)

require (
	github.com/gorilla/websocket v1.5.3 // indirect
	golang.org/x/net v0.43.0 // indirect
	gopkg.in/inf.v0 v0.9.1 // indirect
)
